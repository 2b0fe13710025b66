"""A run directory of a few seconds: the digits with untrained (random) networks of the real architectures."""

import signal
import sys
from pathlib import Path
from types import ModuleType

import torch

from core.config import Config, parse_config
from core.files import file_sha256
from core.models.checkpoints import build_denoiser, save_model
from core.models.denoiser import trained_unet_config
from core.models.small import SmallConvNet
from distributed.store.run_directory import RunDirectory


def run_main(job: ModuleType, *args: str) -> int:
    """The command line of a job in this process: a tenth of the time that a fresh Python takes."""
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [job.__name__, *args]
    try:
        return int(job.main())
    except SystemExit as ended:  # argparse's
        return int(ended.code or 0)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)


PLAIN = {
    "sigmas": [0.25, 0.5],
    "dataset": {"test_size": 1700},
    "labels": {"num_selection": 20, "num_estimation": 60, "alpha": 0.01},
    "certify": {"num_selection": 20, "num_estimation": 100, "alpha": 0.01},
    "report": {"radii": [0, 0.2]},
    "compute": {"batch_size": 64, "shard_examples": 10, "progress_interval_s": 1.0},
}


def tiny_run(path: Path, *overrides: str, weight_seed: int = 0) -> RunDirectory:
    """97 training images, 2 sigmas; denoiser, classifier and estimator as if trained."""
    config: Config = parse_config(PLAIN, overrides)
    run = RunDirectory(path, config)
    torch.manual_seed(weight_seed)
    models = {
        "denoiser": build_denoiser(trained_unet_config(1, 8)),
        **{role: SmallConvNet(1, 8, 10, config.classifier(role).width) for role in config.classifiers},
        "estimator": SmallConvNet(1, 8, 2),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        save_model(model, run.model(name))
    hashes = {name: file_sha256(run.model(name)) for name in models}
    run.finish("train_base", read={}, wrote=hashes, facts={})
    return run
