"""Draw the step: two balls in the Fisher metric and the point farthest along v, in its four cases.

    python recipes/benchmarks/two_balls.py

The picture is recipes/figures/two_balls.png.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle

from trpo_lm.core.trust_region import farthest_point

OUT = Path(__file__).resolve().parent.parent / "figures" / "two_balls.png"
DELTA = 0.5  # first ball: radius sqrt(2 delta) = 1
V = (0.55, 1.0)  # direction of v = F^-1 g
CASES = {  # w = F^-1 b (the reference lies at -w), and k - K
    "old": ((1.2, 0.0), -1.4),
    "both": ((1.9, 0.0), -0.1),
    "ref": ((0.75, 0.0), 0.15),
    "recover": ((2.3, 0.0), 2.3),
}
OLD, REF, STEP = "#0072B2", "#D55E00", "#000000"


def _dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def main():
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.2), constrained_layout=True)
    for axes, (name, (w, excess)) in zip(panels, CASES.items(), strict=True):
        q, r, s = _dot(V, V), _dot(V, w), _dot(w, w)
        alpha, beta, case = farthest_point(q, r, s, delta=DELTA, excess=excess)
        assert case == name, (case, name)
        x, y = (alpha * a + beta * b for a, b in zip(V, w, strict=True))
        old = Circle((0, 0), math.sqrt(2 * DELTA), color=OLD, alpha=0.18, lw=0)
        radius = math.sqrt(max(s - 2 * excess, 0.0))
        ref = Circle((-w[0], -w[1]), radius, color=REF, alpha=0.18, lw=0)
        for ball, colour in ((old, OLD), (ref, REF)):
            axes.add_patch(ball)
            axes.add_patch(Circle(ball.center, ball.radius, fill=False, color=colour, lw=1.2))
        length = math.hypot(*V)
        axes.plot([0, 1.5 * V[0] / length], [0, 1.5 * V[1] / length], ":", color="0.4", lw=1)
        axes.text(1.55 * V[0] / length, 1.55 * V[1] / length, "v", color="0.3", ha="center")
        axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": STEP, "lw": 2})
        axes.plot(0, 0, "o", color=OLD)
        axes.text(0.08, -0.26, r"$\pi_{\rm old}$", color=OLD)
        axes.plot(-w[0], -w[1], "o", color=REF)
        axes.text(-w[0], -w[1] - 0.3, r"$\pi_{\rm ref}$", color=REF, ha="center")
        axes.set_title(f"case “{name}”", fontsize=12)
        axes.set(xlim=(-4.1, 1.3), ylim=(-2.15, 2.15), aspect="equal", xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set_visible(False)
    figure.suptitle(
        "blue: trust region, KL(old ‖ new) ≤ max_kl      "
        "orange: budget, KL(new ‖ ref) ≤ max_ref_kl      arrow: the step",
        fontsize=11,
    )
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=110)
    print(f"wrote {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}")


if __name__ == "__main__":
    main()
