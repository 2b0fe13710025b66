"""Owns the method: bounds, CERTIFY and PREDICT, Dual RS, budgets that stop early, Multiscale.

| module | what it holds |
|---|---|
| `confidence` | bounds of a probability, radii, e-values; everything that is rounded to the safe side |
| `smoothing` | CERTIFY and PREDICT of Cohen et al. 2019 |
| `dual` | DUAL-CERTIFY and DUAL-PREDICT (arXiv 2512.01782) |
| `ladder` | what votes show of ascending radii, looked at more than once |
| `sequential` | both with early stopping |
| `agreement` | the claim that the class stays, whatever level is picked |
| `multiscale` | the cascade of Jeong & Shin 2023, with bounds that hold |

Generators that ask for draws and are sent votes; they know no network. May import `core.records` and `core.errors`.
"""
