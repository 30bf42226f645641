"""A shop that answers the task of the services, by itself."""

import argparse

from shops import answer, shop

from secagg_client.session import ClientKit, ClientSession


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", required=True, help="folder made by secagg provision")
    parser.add_argument("--shop", type=int, required=True)
    parser.add_argument("--server", default="127.0.0.1:7400")
    options = parser.parse_args()
    with ClientSession(options.server, "shops", ClientKit.load(options.kit)) as session:
        for current in session.rounds():
            cost = current.contribute(answer(shop(options.shop)))
            print(f"round {current.number}: sent {cost.upload_bytes} encrypted bytes")


if __name__ == "__main__":
    main()
