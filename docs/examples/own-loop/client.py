"""A client of server.py: fetches offers, trains on its own silo, sends ciphertexts."""

import argparse
import io
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from training import norm, silos, train

from secagg_client.embedded import EmbeddedClient
from secagg_client.kits import ClientKit


def post(url, body):
    with urllib.request.urlopen(urllib.request.Request(url, body)) as answer:
        return answer.read()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", required=True, help="folder made by secagg provision")
    parser.add_argument("--silo", type=int, required=True)
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    parser.add_argument("--state", type=Path, help="folder for ledger and the newest upload")
    options = parser.parse_args()
    client = EmbeddedClient(ClientKit.load(options.kit), "own-loop", folder=options.state)
    data, number, last = silos[options.silo], 0, False
    while not last and (answer := post(f"{options.server}/round/{number}", client.public_key)):
        model = dict(np.load(io.BytesIO(answer), allow_pickle=False))
        offer, number = model.pop("_offer").tobytes(), int(model.pop("_number"))
        last = bool(model.pop("_last"))
        joined = client.join(offer, model)  # refuses what the key holder has not endorsed
        update = train(model, data)
        upload = joined.encrypt({"update": update}, samples=len(data[0]))
        try:
            post(f"{options.server}/upload", upload)
            print(f"round {number}: sent {len(upload)} bytes, norm {norm(update):.2f}", flush=True)
        except urllib.error.HTTPError as refused:  # too late, for one; there are other rounds
            print(f"round {number}: {refused.read().decode()}", flush=True)


if __name__ == "__main__":
    main()
