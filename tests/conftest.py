"""Fixtures shared by the tests: the zoo model, small models, a project folder of its own.

The oracle of most tests is a Gaussian law whose exact answers are written out here in numpy, not
taken from the library.
"""

import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before huggingface_hub is imported: no test needs a network
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from PIL import Image

from ood_lib.analytic import GaussianLaw, analytic_model
from ood_lib.domains import load_images
from ood_lib.files import project_root
from ood_lib.models import load_model
from ood_lib.schedule import NoiseSchedule

torch.set_num_threads(1)  # small networks: two threads on a busy machine wait for each other

ROOT = project_root()
LAMBDAS = np.array([1e-4, 1e-3, 1e-2, 0.1, 1.0])


@pytest.fixture(scope="session", autouse=True)
def plain_torch():
    """Let "auto" choose torch on every processor: compiling each model takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        yield


@pytest.fixture(scope="session")
def root():
    """Folder of the project itself."""
    return ROOT


@pytest.fixture(scope="session")
def schedule():
    """Linear betas from 1e-4 to 2e-2, T = 1000: the schedule of every model here."""
    return NoiseSchedule(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)))


@pytest.fixture(scope="session")
def fashion():
    """The frozen model of the zoo."""
    return load_model("ddpm-fashion-32")


@pytest.fixture(scope="session")
def digits(fashion):
    """Eight images that the zoo model never saw."""
    return load_images("digits", n=8, like=fashion)


def make_unet(*, channels=1, out_channels=None, side=8, seed=0):
    """Small network with random weights; conv_out is enlarged so that its output matters."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=out_channels or channels,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()


def save_pipeline(folder, unet, **scheduler):
    """Save a network as a diffusers pipeline folder, as any user's model would come."""
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(unet, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Pipeline folder of an untrained grey 8x8 model; copy it before changing it."""
    return save_pipeline(tmp_path_factory.mktemp("zoo") / "tiny", make_unet())


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The untrained grey 8x8 model."""
    return load_model(str(tiny_folder))


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_folder):
    """Empty project folder with one tiny model and one shipped domain, made the root of the library."""
    folder = tmp_path / "project"
    (folder / "data" / "zoo").mkdir(parents=True)
    (folder / "data" / "domains").mkdir()
    (folder / "_config.yml").touch()
    (folder / "data" / "zoo" / "tiny").symlink_to(tiny_folder, target_is_directory=True)
    (folder / "data" / "domains" / "faces.npz").symlink_to(ROOT / "data" / "domains" / "faces.npz")
    monkeypatch.setenv("OOD_ROOT", str(folder))
    return folder


@pytest.fixture
def picture_folder(tmp_path):
    """Folder with six noisy grey pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 10), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


class GaussianOracle:
    """Independent coordinates of variance `lam` about `mean`: every exact answer, in plain numpy."""

    def __init__(self, schedule, lam=LAMBDAS, mean=None):
        self.schedule, self.lam = schedule, np.asarray(lam, dtype=float)
        self.mean = np.linspace(-0.3, 0.4, len(self.lam)) if mean is None else mean
        eye = torch.eye(len(self.lam), dtype=torch.float64)
        law = GaussianLaw(torch.from_numpy(self.mean), eye, torch.from_numpy(self.lam))
        self.model = analytic_model(law, schedule)

    def signal(self, t):
        return np.sqrt(self.schedule.alpha_bar[int(t)])

    def tau(self, t):
        ab = self.schedule.alpha_bar[int(t)]
        return np.sqrt((1 - ab) / ab)

    def flow(self, x, t_from, t_to):
        """Exact path: (x / a - m) scales as sqrt(lambda + tau^2)."""
        grow = np.sqrt((self.lam + self.tau(t_to) ** 2) / (self.lam + self.tau(t_from) ** 2))
        xbar = np.asarray(x) / self.signal(t_from)
        return self.signal(t_to) * (self.mean + (xbar - self.mean) * grow)

    def images(self, n, seed=0):
        x = np.random.default_rng(seed).uniform(-0.9, 0.9, (n, 1, 1, len(self.lam)))
        return torch.from_numpy(x)


@pytest.fixture(scope="session")
def oracle(schedule):
    """Gaussian oracle with variances from 1e-4 to 1."""
    return GaussianOracle(schedule)


@pytest.fixture(scope="session")
def smooth_oracle(schedule):
    """Gaussian oracle whose variances are large enough for asymptotic orders to show early."""
    return GaussianOracle(schedule, [0.01, 0.1, 1.0])


@pytest.fixture(scope="session")
def factory():
    """Return the makers of small models and oracles, for tests that need a variant."""
    return SimpleNamespace(unet=make_unet, pipeline=save_pipeline, oracle=GaussianOracle)
