"""The bar in a log: a line at a time, what is done, what is left."""

import sys

from tokensel.utils.progress import progress_bar


def test_a_log_gets_whole_lines_and_no_carriage_returns(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with progress_bar(10, done=4, unit="answers") as bar:
        bar.mininterval = 0
        bar.set_description("forms, random 0.3", refresh=False)
        for _ in range(3):
            bar.update(2)
    told = capsys.readouterr().err
    lines = told.splitlines()
    assert "\r" not in told and all(lines)
    assert "4/10" in lines[0]
    assert lines[-1].startswith("forms, random 0.3: 100%") and "10/10" in lines[-1]
    assert all(len(line) <= 120 for line in lines)


def test_silence(capsys):
    with progress_bar(3, shown=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
