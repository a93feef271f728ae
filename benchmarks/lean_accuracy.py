"""What the lean step loses: accuracy on the NPU of `fp32_pass="where_needed"` beside "always".

    python benchmarks/lean_accuracy.py [--seeds 3] [--profiles pow2-trunc,acc18,tflm] [--dataset digits]

Both trainings start from the same FP32 network and the same ranges, see the same batches in the same order
and take the recipe of `npu-trainer compare`. One row a profile: mean (each seed), percent of the test set.
"""

import argparse
import dataclasses
import statistics

import torch

import trainer_client
from trainer_client.commands.data import load_dataset
from trainer_client.commands.nets import build_model
from trainer_client.commands.trainer import FINETUNE_RECIPE, FP32_RECIPES, accuracy, batches, fit
from trainer_client.qat.calibrate import observe
from trainer_client.qat.capture import capture
from trainer_client.qat.module import FP32_PASSES, QatModule


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--profiles", default="pow2-trunc,acc18,tflm")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="mobilenet-v1-small")
    parser.add_argument("--fp32-steps", type=int)
    parser.add_argument("--qat-steps", type=int, default=FINETUNE_RECIPE.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset(arguments.dataset, None)
    fp32 = FP32_RECIPES[data.name]
    fp32 = dataclasses.replace(fp32, steps=arguments.fp32_steps or fp32.steps)
    finetune = dataclasses.replace(FINETUNE_RECIPE, steps=arguments.qat_steps)
    starts = []
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        model = build_model(arguments.model, data.classes, data.channels)
        fit(model.train(), data, fp32, seed)
        starts.append({name: value.clone() for name, value in model.state_dict().items()})
    captured = capture(build_model(arguments.model, data.classes, data.channels), data.train_x[:2])
    print(f"{arguments.model}, {data.name}, {finetune.steps} steps, {arguments.seeds} seeds", flush=True)
    columns = " ".join(f"{name:>30s}" for name in FP32_PASSES)
    print(f"{'profile':12s} {'PTQ':>24s} {columns}  difference")
    for profile in arguments.profiles.split(","):
        found: dict[str, list[float]] = {"PTQ": [], **{name: [] for name in FP32_PASSES}}
        with trainer_client.connect(profile=profile) as npu:
            for seed, state in enumerate(starts):
                captured.model.load_state_dict(state)
                ranges = observe(captured, batches(data.calibration_set(1024), 64))
                for fp32_pass in FP32_PASSES:
                    captured.model.load_state_dict(state)
                    qat = QatModule(captured, npu, ranges=ranges, fp32_pass=fp32_pass)
                    if fp32_pass == "always":
                        found["PTQ"].append(accuracy(qat, data.test_x, data.test_y))
                    fit(qat.train(), data, finetune, seed)
                    found[fp32_pass].append(accuracy(qat, data.test_x, data.test_y))
                    qat.close()
        means = {name: statistics.mean(values) for name, values in found.items()}
        cells = [
            f"{means[name]:6.2f} ({' '.join(f'{value:.1f}' for value in values)})"
            for name, values in found.items()
        ]
        difference = means["where_needed"] - means["always"]
        print(
            f"{profile:12s} {cells[0]:>24s} {cells[1]:>30s} {cells[2]:>30s} {difference:+10.2f}", flush=True
        )


if __name__ == "__main__":
    main()
