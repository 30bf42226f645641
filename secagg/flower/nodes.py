"""What the wrapper knows of Flower's nodes: their public keys, and verdicts due to them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from secagg.enrolment import Roster
from secagg.errors import ClosedError, IdentityError, SecaggError
from secagg.flower.envelopes import RECORD, Instruction, public_key_of, reason_of
from secagg.flower.rounds import NO_REPLY, Outcome

__all__ = ["Nodes"]


class Nodes:
    """Nodes by Flower's id. Which client a node is, only its key says; logs name neither."""

    def __init__(self) -> None:
        self._keys: dict[int, bytes] = {}
        self._judging: set[int] = set()
        self._notices: dict[int, bytes] = {}

    def greet(self, messages: Iterable[Message], grid: Grid, timeout: float) -> Counter[str]:
        """Ask those nodes for their public keys that are not known yet.

        Args:
            messages: what is about to be sent; a node is asked in a message of the same type,
                which its app's mods then see.
            timeout: seconds.

        Returns:
            Nodes without an answer, by reason.
        """
        asked = {
            message.metadata.dst_node_id: message.metadata.message_type
            for message in messages
            if message.metadata.dst_node_id not in self._keys
        }
        if not asked:
            return Counter()
        failed = Counter({NO_REPLY: len(asked)})
        hello = RecordDict({RECORD: Instruction(hello=True).to_record()})
        greetings = [Message(hello, node, kind) for node, kind in asked.items()]
        for reply in grid.send_and_receive(greetings, timeout=timeout):
            failed[NO_REPLY] -= 1
            if reply.has_error():
                failed[reason_of(reply)] += 1
                continue
            try:
                self._take(reply)
            except SecaggError as error:
                failed[error.reason] += 1
        return +failed

    def _take(self, reply: Message) -> None:
        key, judges = public_key_of(reply)
        node = reply.metadata.src_node_id
        self._keys[node] = key
        if judges:
            self._judging.add(node)

    def enrolled(
        self, messages: Iterable[Message], roster: Roster
    ) -> tuple[list[Message], Counter[str]]:
        """Messages to nodes whose key is known and enrolled; and the others' number, by reason."""
        found, refused = [], Counter[str]()
        for message in messages:
            if (key := self.key(message)) is None:
                continue
            try:
                roster.client_of(key)
            except IdentityError as error:
                refused[error.reason] += 1
            else:
                found.append(message)
        return found, refused

    def key(self, message: Message) -> bytes | None:
        """The public key of the node that a message is for; None if it is not known."""
        return self._keys.get(message.metadata.dst_node_id)

    def learn(self, outcome: Outcome) -> None:
        """Have those who check verdicts told theirs, with their next message.

        Nodes whose upload was not taken are greeted again: they may have got another key.
        """
        for node in outcome.strangers:
            self._keys.pop(node, None)
        for node in self._judging.intersection(outcome.senders):
            # Whose upload was refused for its form has no verdict on its norm.
            with contextlib.suppress(ClosedError):
                self._notices[node] = outcome.round.notice(self._keys[node])

    def notice(self, message: Message) -> bytes:
        """The verdict that is due with a message, once; empty for none."""
        return self._notices.pop(message.metadata.dst_node_id, b"")

    def last_notices(self, kind: str) -> Sequence[Message]:
        """What is due still, in messages of its own.

        Args:
            kind: message type.
        """
        due, self._notices = self._notices, {}
        return [
            Message(
                RecordDict({RECORD: Instruction(hello=True, notice=notice).to_record()}), node, kind
            )
            for node, notice in due.items()
        ]
