"""The same loop between processes: the server's side, over HTTP.

Two requests, bytes in and bytes out. `POST /round/N` with a client's public key waits for a round
after N and answers with its offer and the model; `POST /upload` takes what the client encrypted.
The key holder is the service, `secagg-keyholder run`. Who listens in, or is this server, reads
nothing but the model and the sums. On a network that is not yours, put TLS in front.
"""

import argparse
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from training import accuracy, load, weights

import secagg
from secagg.errors import ClosedError, QuorumError
from secagg_server.embedded import EmbeddedServer


class Rounds:
    """The round that is open, for the threads of the HTTP server; None between two."""

    def __init__(self, count):
        self.changed = threading.Condition()
        self.open, self.number, self.model, self.over = None, 0, {}, False
        self.count = count

    def begin(self, opened, number, model):
        with self.changed:
            self.open, self.number, self.model = opened, number, model
            self.changed.notify_all()

    def wait_for_uploads(self, wanted, seconds):
        with self.changed:
            self.changed.wait_for(lambda: self.open.uploads >= wanted, timeout=seconds)
            self.open = None

    def end(self):
        with self.changed:
            self.over = True
            self.changed.notify_all()

    def offer(self, client_key, after):
        """Offer and model of a round after this one, as an .npz; nothing once training is over."""
        with self.changed:
            self.changed.wait_for(lambda: self.over or (self.open and self.number > after))
            if self.over:
                return b""
            offer = np.frombuffer(self.open.offer(client_key), np.uint8)
            about = {"_offer": offer, "_number": self.number, "_last": self.number == self.count}
            model = self.model
        packed = io.BytesIO()
        np.savez(packed, **about, **model)
        return packed.getvalue()

    def upload(self, data):
        with self.changed:
            if self.open is None:
                raise ClosedError("expected an open round; got none; come back for the next one")
            name = self.open.add(data)
            self.changed.notify_all()
        return name


class Handler(BaseHTTPRequestHandler):
    rounds: Rounds

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            if self.path.startswith("/round/"):
                answer = self.rounds.offer(body, after=int(self.path.rpartition("/")[2]))
            else:
                answer = self.rounds.upload(body).encode()
            status = 200
        except secagg.SecaggError as error:
            status, answer = 400, f"{error.reason}: {error}".encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Nothing: this line is where names and addresses of clients would be."""


def train(server, rounds, clients, deadline_s):
    current = weights()
    plan = secagg.plan_tensors(
        {name: value.shape for name, value in current.items()},
        max_clients=len(server.roster.active()),
        clip=2.0,
        weighting="samples",
        weight_cap=200,
        norm_check=secagg.NormCheck(),
    )
    for number in range(1, rounds.count + 1):
        with server.open(plan, task_id="own-loop", round_number=number, model=current) as opened:
            rounds.begin(opened, number, current)
            rounds.wait_for_uploads(clients, deadline_s)
            try:
                done = opened.conclude()
            except QuorumError as error:
                print(f"round {number}: {error}; the model stays as it is", flush=True)
                continue
        mean = done.release.mean()
        current = {name: value + np.float32(mean[name]) for name, value in current.items()}
        load(current)
        print(
            f"round {number}: {len(done.contributors)} clients, {len(done.refused)} refused, "
            f"accuracy {accuracy():.3f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description="FedAvg over HTTP, with encrypted updates.")
    parser.add_argument("--kit", default="kits/server", help="folder made by secagg provision")
    parser.add_argument("--key-holder", default="127.0.0.1:7402")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--clients", type=int, default=5, help="close a round at so many uploads")
    parser.add_argument("--deadline-s", type=float, default=60.0, help="or after so many seconds")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    Handler.rounds = rounds = Rounds(options.rounds)
    http = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    http.daemon_threads = False  # whoever waits for a round is told that there is none
    threading.Thread(target=http.serve_forever).start()
    print(f"listening on port {http.server_port}", flush=True)
    try:
        with EmbeddedServer.load(options.kit, options.key_holder) as server:
            train(server, rounds, options.clients, options.deadline_s)
    finally:
        rounds.end()
        http.shutdown()
        http.server_close()


if __name__ == "__main__":
    main()
