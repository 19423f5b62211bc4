"""A server on loopback for tests: OpenAI-compatible, answers by a rule, and can go wrong in any way."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from tokensel.benchmarks.questions import image_digest

NAME = "tiny-llava"


class Handler(BaseHTTPRequestHandler):
    """Chat completions by the rule of the server, and what goes wrong with them."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def reply(self, content, status=200):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply({"data": [{"id": name, "owned_by": "rule"} for name in self.server.names]})

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(self.headers)
            self.server.open += 1
            self.server.peak = max(self.server.peak, self.server.open)
            fault = self.server.fault(body, len(self.server.bodies))
        try:
            self.answer(body, fault)
        except BrokenPipeError:  # the client did not wait
            self.close_connection = True

    def answer(self, body, fault):
        text, tokens = self.server.rule(body)
        message = {"role": "assistant", "content": text}
        answer = {
            "choices": [{"message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": tokens, "completion_tokens": len(text)},
        }
        if fault == "late":
            time.sleep(2 * server.TIMEOUT)
        elif fault == "unfinished":
            answer["choices"][0] |= {"finish_reason": "abort", "message": message | {"content": ""}}
        elif fault == "no text":
            message["content"] = None
        elif fault == "no choices":
            answer = {"choices": []}
        elif fault == "no object":
            answer = ["choices"]
        elif fault == "no usage":
            del answer["usage"]
        with self.server.lock:
            self.server.open -= 1
        if isinstance(fault, int):
            self.reply({"error": {"message": f"fault\n{fault}"}}, fault)
        elif fault == "no JSON":
            self.reply(b"<html>Bad gateway</html>")
        elif fault in ("hang up", "cut") or self.server.dead:
            if fault == "cut":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")
            self.close_connection = True
        else:
            self.reply(answer)


class RuleServer(ThreadingHTTPServer):
    """A server on loopback that answers by ``rule(body) -> (text, tokens of the prompt)``."""

    request_queue_size = 64

    def __init__(self, rule, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.rule, self.names, self.fault = rule, [NAME], lambda body, number: None
        self.bodies, self.headers, self.open, self.peak, self.dead = [], [], 0, 0, False
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def kill(self):
        """No answer any more, to requests that are open neither."""
        self.dead = True
        self.shutdown()
        self.socket.close()

    def asked(self):
        """The requests for answers: without those that check whether the keep is followed."""
        return [body for body in self.bodies if body["max_tokens"] > 1]


def parts(body):
    """Image digests, text and keep of a request; no keep without an image."""
    (turn,) = body["messages"]
    *images, text = turn["content"]
    decoded = []
    for image in images:
        head, data = image["image_url"]["url"].split(",")
        assert head == "data:image/png;base64"
        decoded.append(image_digest(Image.open(io.BytesIO(base64.b64decode(data)))))
    return decoded, text["text"], body.get("mm_processor_kwargs", {}).get("keep")
