"""Ray and files: what is certified where, and the proof that it is whole. Holds no probability.

| package | what it owns |
|---|---|
| `methods` | what a certification method is to the pipeline |
| `files` | folders on disks and object stores, data sets read from there |
| `store` | a run directory: lock, manifest, plans, shards |
| `cluster` | joining or starting Ray |
| `execution` | from a plan to committed shards |
| `training` | what is learned from shards |
| `views` | rows for people |
| `checks` | before, during and after a run |
| `studies` | runs made of runs |

Each may import those above it. `files` and `methods` do not know one another, nor do `cluster` and `store`, nor
`training` and `views`.
"""
