"""`compute`: how it runs."""

from typing import Annotated, Literal

from pydantic import Field

from core.config.values import Count, Positive, Section

__all__ = ["ComputeConfig"]


Precision = Literal["float32", "tf32", "bfloat16", "float16"]
Compile = bool | Literal["graphs"]


class ComputeConfig(Section):
    """How it runs. Of these, only `batch_size`, `precision`, `channels_last`, `compile`, `chunk_size`, `device` and, in
    the last bits, thread counts can touch a count.
    """

    executor: Literal["ray", "local"] = "ray"
    """`ray`: replicas on Ray actors; `local`: the reference, one replica in this process, without Ray."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is a GPU."""
    batch_size: Literal["auto"] | Count = 500
    """Rows of every forward pass. `auto` measures, once, before a step's plan is written: doubled while two batches fit
    the memory and rows per second still grow. The plan keeps the number, for all replicas and every resumption."""
    precision: Precision = "float32"
    """Of the arithmetic in denoiser and heads when certificates are made: `tf32` on CUDA's tensor cores; `bfloat16`,
    `float16` by autocast. Noise, images, the timestep embedding and votes stay float32. Trainings have their own."""
    channels_last: bool = False
    """Memory order that convolutions on tensor cores want. On a CPU it may be slower: see docs/performance.md."""
    compile: Compile = False
    """torch.compile of denoiser and heads, in every replica: minutes before its first pass. `graphs` also records CUDA
    graphs, for networks so small that launching their kernels takes longer than running them."""
    chunk_size: Count = 100
    """Draws that share one noise key, in runs with `noise_version: 1`; without meaning in others."""
    min_replicas: Count = 1
    """Replicas that the pool keeps at least, where `max_replicas` is given."""
    max_replicas: Annotated[int, Field(ge=0)] = 0
    """Replicas at most: the pool asks an autoscaling cluster for so many. 0 takes what the cluster has room for now."""
    gpus_per_replica: Positive = 1.0
    """Share of a GPU that a replica takes; 0.5 puts two on one."""
    threads_per_replica: Count = 1
    """CPU threads of a replica."""
    train_device: Literal["cpu", "cuda"] = "cpu"
    """Where the trainings run. `cuda` on a cluster whose head has no GPU: on a node that has one, as with
    `train_workers` 1."""
    train_workers: Annotated[int, Field(ge=0)] = 0
    """Workers of Ray Train that share every batch of a training: one GPU each, or `train_threads` CPUs; trainings of a
    pool run side by side where there is room. 0: in the driver's process. The same weights up to rounding (BatchNorm's
    statistics come from each worker's slice)."""
    train_retries: Annotated[int, Field(ge=0)] = 10
    """A training step gives up when its workers have failed more often than this; each time they go on from the last
    checkpoint."""
    train_threads: Count = 1
    """CPU threads of the training jobs; another number may change the last bits of the weights, and does not pay for
    networks as small as the digits'."""
    shard_examples: Literal["auto"] | Count = "auto"
    """Examples per Parquet shard, the unit of work and of what a crash can lose; `auto` measures the rate first."""
    shard_seconds: Positive = 20.0
    """What a shard should take one replica, for `shard_examples: auto`."""
    part_rows: Count = 1_000_000
    """Rows of the files into which shards are joined when a step is finished."""
    max_errors: Annotated[int, Field(ge=0)] = 100
    """A step gives up when more examples than this cannot be run."""
    max_attempts: Count = 20
    """A step gives up on a shard that so many replicas have begun and none has finished."""
    max_device_hours: Positive | None = None
    """The run stops when it has taken so many hours of GPUs (on CPUs: of replicas and training workers), all its starts
    together; a larger number goes on. What is committed stays."""
    hang_s: Annotated[float, Field(ge=0)] = 1200.0
    """A replica that gets nothing done for so many seconds (no batch, no loaded file, no commit) is ended, and another
    one starts in its place. Longer than loading, compiling or a batch may take, and than a store may fail (ten
    minutes). 0: never."""
    progress_interval_s: Positive = 10.0
    """Seconds between two progress lines where there is no terminal."""

    @property
    def training_batch_size(self) -> int:
        """Rows of the forward passes of the training jobs, where `auto` is 500: no weight hangs on a measurement."""
        return 500 if self.batch_size == "auto" else self.batch_size
