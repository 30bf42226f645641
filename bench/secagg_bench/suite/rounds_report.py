"""Tables of whole rounds: what one takes of everybody, and what a line adds to it."""

from __future__ import annotations

from collections.abc import Sequence

from secagg_bench.suite.medians import groups, middle, systems_of
from secagg_bench.suite.report import figures, markdown, megabytes, source, time
from secagg_bench.suite.rows import Metric, Row

__all__ = ["lines_table", "rounds_table"]

_OF_CLIENTS = {
    Metric.FETCHING: "a client fetches",
    Metric.ENCRYPTING: "encrypts",
    Metric.UPLOADING: "uploads",
    Metric.CLIENTS_CPU: "its processor time",
    Metric.SERVER_CPU: "server's, for each client",
}
"""What is divided by the number of clients."""

_ON_A_LINE = (Metric.FETCHING, Metric.ENCRYPTING, Metric.UPLOADING, Metric.LEAST)
_ONCE = {
    Metric.CONCLUDING: "last upload to sums",
    Metric.KEY_HOLDER_CPU: "key holder's processor time",
}
_MEMORY = {
    Metric.SERVER_MEMORY: "server holds",
    Metric.KEY_HOLDER_MEMORY: "key holder holds",
}


def rounds_table(rows: Sequence[Row]) -> str:
    """A line for each cohort and system: a whole round, and what of it is whose.

    Args:
        rows: of scenarios of whole rounds.
    """
    lines = []
    for (parameters, clients), group in groups(rows):
        for system in systems_of(group):
            cells = [f"{parameters:,}", f"{clients:,}", system]
            cells.append(time(middle(group, Metric.ROUND, system)))
            cells += [time(middle(group, each, system) / clients) for each in _OF_CLIENTS]
            cells += [time(middle(group, each, system)) for each in _ONCE]
            cells += [megabytes(middle(group, each, system)) for each in _MEMORY]
            lines.append(cells)
    heads = ["parameters", "clients", "system", "whole round"]
    heads += [*_OF_CLIENTS.values(), *_ONCE.values(), *_MEMORY.values()]
    note = (
        "Wall time, but for what is called processor time. Clients, server and key holder share "
        "the machine, clients at low priority, one at a time in each of their processes: what they "
        "wait for one another is in the wall times. An upload is of "
        f"{_sizes(rows)}. Every sum is exactly that of the clients' integers. {_measured(rows)}"
    )
    return markdown(heads, lines, note, texts=(2,))


def lines_table(rows: Sequence[Row]) -> str:
    """A line for each line: what clients wait for, beside the least time that it allows.

    Args:
        rows: of scenarios whose systems have lines.
    """
    lines = []
    for (_, clients), group in groups(rows):
        for system in systems_of(group):
            whole = {each: middle(group, each, system) for each in Metric}
            fetched, encrypted, uploaded, least = (whole[each] / clients for each in _ON_A_LINE)
            lines.append(
                [
                    system,
                    *(time(each) for each in (fetched, encrypted, uploaded)),
                    time(least) if least else "–",
                    f"× {figures((fetched + uploaded) / least, 3)}" if least else "–",
                    *(time(whole[each]) for each in (Metric.CONCLUDING, Metric.ROUND)),
                ]
            )
    heads = ["line", "a client fetches", "encrypts", "uploads", "least of the line"]
    heads += ["fetching and uploading take", "last upload to sums", "whole round"]
    cohorts = " or ".join(dict.fromkeys(f"{row.clients:,}" for row in rows))
    models = " or ".join(dict.fromkeys(f"{row.parameters:,}" for row in rows))
    note = (
        f"{cohorts} clients, one after another on the line, each with a connection of its own; the "
        "line's rate in both directions, and its round trip. A client fetches a model of "
        f"{models} parameters and uploads {_sizes(rows)}. The least that a line allows: their "
        "bytes at its rate, without any header, and five round trips, for TCP, TLS, the round, the "
        f"model and the last word. {_measured(rows)}"
    )
    return markdown(heads, lines, note)


def _sizes(rows: Sequence[Row]) -> str:
    found = sorted({row.value for row in rows if row.metric is Metric.UPLOAD})
    return " or ".join(dict.fromkeys(f"{size / 1e6:.3g} MB" for size in found))


def _measured(rows: Sequence[Row]) -> str:
    return f"{'; '.join(dict.fromkeys(row.version for row in rows))}. {source(rows)}"
