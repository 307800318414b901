"""How many placeholders remain of each of their runs in a prompt."""


def largest_remainder(sizes: list[int], total: int) -> list[int]:
    """Shares out `total` in proportion to `sizes`, none above its size; equal remainders go to the earlier one."""
    whole = sum(sizes)
    shares = [size * total // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -(sizes[index] * total % whole))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares


def share_over_runs(runs: list[int], views: list[int], kept: list[int]) -> list[int]:
    """
    What remains of each run of placeholders, when `kept` of each of the `views` do.

    A run may hold several views, and tokens of none (newlines), which leave. A view may be written as several runs
    (rows with breaks between them): then its kept tokens are shared over them by largest remainder.
    """
    if len(runs) == 1:
        return [sum(kept)]
    remaining, view = [], 0
    run = 0
    while run < len(runs):
        if views[view] <= runs[run]:
            held, total = 0, 0
            while view < len(views) and held + views[view] <= runs[run]:
                held, total, view = held + views[view], total + kept[view], view + 1
            remaining.append(total)
            run += 1
            continue
        rows = [runs[run]]
        while sum(rows) < views[view]:
            run += 1
            rows.append(runs[run])
        remaining += largest_remainder(rows, kept[view])
        run, view = run + 1, view + 1
    return remaining
