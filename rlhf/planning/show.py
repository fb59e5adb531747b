"""A plan as a table."""

from typing import TYPE_CHECKING

from rlhf.planning.learner import GIB
from rlhf.planning.plan import MIB, Plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_plan(plan: Plan, notes: list[str], console: "Console") -> None:
    """Print the placement table, the memory of an actor of each role by part, and what was not checked.

    With GPUs, CPU memory has a column of its own.
    """
    from rich.table import Table

    gpus = plan.device == "cuda"
    table = Table(title=f"Placement and memory ({plan.device})", title_justify="left")
    memory = ("GPU GiB each", "CPU GiB each") if gpus else ("GiB each",)
    for column in ("role", "actors", "CPUs each", "GPUs each", *memory, "of which"):
        table.add_column(column, justify="left" if column in ("role", "of which") else "right")
    for role in plan.roles:
        parts = [_parts(role.memory)] + ([f"CPU: {_parts(role.host)}"] if role.host else [])
        here, there = (role.total, role.host_total) if role.gpus else (0, role.total)
        figures = (_gib(here) if here else "", _gib(there)) if gpus else (_gib(role.total),)
        count = f"{role.gpus} shared" if role.gpus and plan.turns else str(role.gpus)
        table.add_row(role.name, str(role.actors), str(role.cpus), count, *figures, "; ".join(parts))
    empty = ("",) if gpus else ()
    table.add_row("object store", "", "", "", *empty, _gib(plan.object_store), "weights on their way, rollouts, pairs")
    table.add_section()
    whole = (_gib(plan.gpu_total),) if gpus else ()
    table.add_row("all", "", "", "", *whole, _gib(plan.total), "an estimate: allocators keep some more")
    console.print(table)
    if plan.turns:
        console.print(_turns(plan))
    free = _free_memory()
    if plan.private and plan.device == "cpu" and plan.total > free:
        short = f"about {_gib(plan.total, 1)} GiB are needed and {_gib(free, 1)} GiB are free on this machine"
        notes = [*notes, short]
    for note in (*notes, *plan.notes):
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)


def _turns(plan: Plan) -> "Table":
    """What one GPU holds in each turn; the largest is what it has to hold."""
    from rich.table import Table

    table = Table(title=f"Turns on each of {plan.shared} GPUs", title_justify="left")
    for column in ("turn", "GPU GiB", "of which"):
        table.add_column(column, justify="right" if column == "GPU GiB" else "left")
    for turn in plan.turns:
        table.add_row(turn.name, _gib(turn.total), _parts(turn.memory))
    table.add_section()
    table.add_row("largest", _gib(max(turn.total for turn in plan.turns)), "")
    return table


def _parts(memory: dict[str, int]) -> str:
    return ", ".join(f"{part} {_gib(amount)}" for part, amount in memory.items() if amount >= 5 * MIB)


def _gib(amount: int, digits: int = 2) -> str:
    return f"{amount / GIB:.{digits}f}"


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
