"""Convert a U-Net of OpenAI's (improved-diffusion or guided-diffusion) to a diffusers folder, and check the result."""

import argparse
import sys
from pathlib import Path

from core.errors import ConfigError
from jobs._cli import EXIT_CODES, run_job

SIGMAS = (0.25, 1.0)


def run(source: Path, target: Path, head_dim: int | None, schedule: str | None) -> None:
    """Write `target`, load it again, and compare both networks on a seeded batch."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{str(target)!r} is there already: name a new folder, or remove it")
    import torch

    from core.models.checkpoints import assemble_denoiser, load_denoiser
    from core.models.diffusers_folder import write_folder
    from core.models.openai_unet import convert_openai_unet
    from core.models.weights import read_weights

    name = repr(str(source))
    state = read_weights(source)
    num_keys, num_original = len(state), sum(tensor.numel() for tensor in state.values())
    converted = convert_openai_unet(state, head_dim=head_dim, schedule=schedule, source=name)
    denoiser = assemble_denoiser(converted.config, converted.weights, converted.schedule_arguments, name)
    write_folder(denoiser, target)
    loaded = load_denoiser(target)

    num_parameters = sum(parameter.numel() for parameter in loaded.parameters())
    stride = 2 ** (len(converted.config["block_out_channels"]) - 1)
    size = max(stride, min(converted.config["sample_size"] or 32, 64) // stride * stride)
    generator = torch.Generator().manual_seed(0)
    images = torch.empty(len(SIGMAS), converted.config["in_channels"], size, size).normal_(generator=generator)
    t = loaded.timesteps(torch.tensor(SIGMAS))
    with torch.inference_mode():
        difference = float((loaded.predict_noise(images, t) - denoiser.predict_noise(images, t)).abs().max())
    print(
        f"{converted.family}: {num_parameters:,} parameters ({num_original:,} in the source), all {num_keys} keys "
        f"used; {loaded.schedule} schedule of {loaded.num_steps} steps"
    )
    print(f"largest difference of {target} from the conversion in memory: {difference:g}, at {size}x{size} pixels")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.convert", description=__doc__, epilog=EXIT_CODES)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="checkpoint, for example 256x256_diffusion_uncond.pt"
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to make")
    parser.add_argument(
        "--head-dim", type=int, metavar="N", help="channels of an attention head, of a network that is not published"
    )
    parser.add_argument(
        "--schedule",
        metavar="NAME-STEPS",
        help="noise schedule that it was trained with, likewise: linear-1000, cosine-4000, ...",
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return run_job(parser, lambda args: run(args.source, args.target, args.head_dim, args.schedule))


if __name__ == "__main__":
    sys.exit(main())
