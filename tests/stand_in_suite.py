"""Three benchmarks of the book's suite, one of each group, for short runs of its chapters."""

from tokensel.book.mini import suite

BENCHMARKS = {name: suite.BENCHMARKS[name] for name in ("forms", "attributes", "describe")}
