"""Compare the gradients of a training step with and without ``torch.compile``.

    .venv/bin/python benchmarks/compiled_gradients.py

With torch 2.13.0 on a CPU, the weights of the down blocks get no gradient from the compiled network:
the loss still falls, and the model that results is a bad one. So training is not compiled.
"""

import numpy as np
import torch

from ood_lib.training import Recipe, TrainingRun


def gradients(run: TrainingRun, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a squared output, by the name of the weight."""
    x = torch.randn((8, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    run.net.zero_grad()
    network(x, torch.arange(8) * 100).sample.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in run.net.named_parameters()}


def main() -> None:
    """Print the weights whose gradient vanishes when compiled."""
    run = TrainingRun(np.zeros((8, 32, 32, 1), np.uint8), Recipe(), "cpu")
    eager, compiled = gradients(run, run.net), gradients(run, torch.compile(run.net))
    lost = [name for name in eager if eager[name].norm() > 0 and compiled[name].norm() == 0]
    print(f"{len(lost)} of {len(eager)} weights get no gradient when compiled")
    print("\n".join(lost[:10]))


if __name__ == "__main__":
    main()
