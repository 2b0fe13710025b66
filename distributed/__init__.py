"""Ray and files: what is certified where, and the proof that it is whole. Holds no probability.

| package | what it owns |
|---|---|
| `methods` | what a certification method is to the pipeline |
| `store` | what is on disk: run directories, plans, shards, data sets |
| `execution` | from a plan to committed shards |
| `training` | what is learned from shards |
| `checks` | before, during and after a run |
| `views` | rows for people |
| `studies` | runs made of runs |

Each may import those above it; `training`, `checks` and `views` do not know one another.
"""
