"""Federated averaging with encrypted updates, in NVFlare's simulator.

    python job.py 127.0.0.1:7402 kits

The key holder runs at the address; the folder is what `secagg provision init` made.
"""

import sys
import uuid
from pathlib import Path

from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

from secagg.nvflare import SecaggAggregator, SecaggEncryptor, SecaggJoin

if __name__ == "__main__":
    key_holder, kits = sys.argv[1], Path(sys.argv[2]).resolve()
    task = f"simulation-{uuid.uuid4()}"  # the simulator gives every run the same job id
    recipe = NumpyFedAvgRecipe(
        name="secagg-fedavg",
        model=[0.0] * 8,
        min_clients=3,
        num_rounds=2,
        train_script="client.py",
        aggregator=SecaggAggregator(
            key_holder, kit=f"{kits}/server", task=task, clip=4.0, weight_cap=20
        ),
    )
    join = SecaggJoin(kit=f"{kits}/clients/{{site}}", task=task)
    recipe.add_client_input_filter(join, tasks=["train"])
    recipe.add_client_output_filter(SecaggEncryptor(), tasks=["train"])
    env = SimEnv(clients=["site-1", "site-2", "site-3"], workspace_root=f"{Path.cwd()}/workspace")
    print(recipe.execute(env).get_result())
