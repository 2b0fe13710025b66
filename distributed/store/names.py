"""Names of files of rows: one spelling for each shard and each part."""

import re
from collections.abc import Sequence

__all__ = ["odd_names", "part_name", "shard_name", "shards_of"]


def shard_name(shard: int) -> str:
    """Of the file of one shard."""
    return f"shard-{shard:06d}.parquet"


def part_name(first: int, last: int) -> str:
    """Of the file that joins the shards `first` to `last`."""
    return f"part-{first:06d}-{last:06d}.parquet"


def shards_of(name: str) -> range:
    """The shards that a file holds, by its name; none for a foreign file, or another spelling of a name."""
    numbers = [int(number) for number in re.findall("-([0-9]{6,})", name)]
    if len(numbers) == 1 and name == shard_name(*numbers):
        return range(numbers[0], numbers[0] + 1)
    if len(numbers) == 2 and numbers[0] < numbers[1] and name == part_name(*numbers):
        return range(numbers[0], numbers[1] + 1)
    return range(0)


def odd_names(names: Sequence[str], num_shards: int | None) -> list[tuple[str, str]]:
    """Parquet files that are not called as a plan's are, or hold shards that another one holds too; and why.

    A shard beside a part that covers it is as it should be. `num_shards`: of the plan; None where there is none.
    """
    odd, holder = [], dict[int, str]()
    for name in sorted(name for name in names if name.endswith(".parquet")):
        shards = shards_of(name)
        if not shards:
            odd.append((name, "is not the name of a shard or a part"))
        elif num_shards is not None and shards[-1] >= num_shards:
            odd.append((name, f"is beyond the {num_shards} shards of the plan"))
        elif len(shards) > 1:
            if twice := next((holder[shard] for shard in shards if shard in holder), None):
                odd.append((name, f"holds shards that {twice!r} holds too"))
            holder |= dict.fromkeys(shards, name)
    return odd
