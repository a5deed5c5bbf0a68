"""Slow reference of chapter 5, three latent dimensions by nested quadrature (ten minutes):

    python tests/references/make_analytic_em.py
"""

import json
from pathlib import Path

from dlgm_tutorial.oracles import relu_marginal

LAYERS = [([[1, .2, -.3], [-.5, .8, .4], [.3, -.6, .9], [.2, .5, .7]], [.1, -.3, .2, .4]),
          ([[.9, -.4, .6, .3], [.2, 1, -.5, -.7]], [-.1, .3])]
X, NOISE_VAR, SLOPE, OUTER, PANELS = [.4, -.7], .36, .1, (160, 6), 4

if __name__ == "__main__":
    log_px, mean, second = relu_marginal(LAYERS, X, NOISE_VAR, SLOPE, PANELS, 9.0, OUTER)
    Path(__file__).with_name("analytic_em_k3.json").write_text(json.dumps(
        {"command": "python tests/references/make_analytic_em.py", "layers": LAYERS, "x": X, "noise_var": NOISE_VAR,
         "slope": SLOPE, "outer": OUTER, "panels": PANELS, "log_px": log_px, "mean": mean.tolist(),
         "second": second.tolist()}, indent=1) + "\n")
