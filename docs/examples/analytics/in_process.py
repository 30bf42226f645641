"""One encrypted round over six shops, in one process, beside all data in one place."""

import numpy as np
from shops import DECADES, MOST, UPPER, answer, shop, show, statistics

import secagg

shops = [shop(number) for number in range(6)]
plan = secagg.make_plan(
    [
        secagg.IntegerSegment("gram", len(UPPER[0]), max_abs=MOST),
        secagg.IntegerSegment("ages", len(DECADES) - 1, max_abs=100_000),
    ],
    max_clients=20,
)
holder = secagg.KeyHolder(plan)
server = secagg.Aggregator(holder.context)
for data in shops:
    server.add(secagg.Encryptor(holder.context).encrypt_segments(answer(data)))
release = holder.release(server.aggregate())
sums = {name: release.total(name) for name in ("gram", "ages")}
show(sums)

central = answer(np.concatenate(shops))
same = all(np.array_equal(sums[name], central[name]) for name in sums)
pairs = zip(statistics(sums["gram"]), statistics(central["gram"]), strict=True)
same = same and all(np.array_equal(*pair) for pair in pairs)
print("bit for bit what all data in one place give:", same)
