"""`python -m trpo_lm.comparison_page FOLDER`: redraw the page of a comparison."""

from trpo_lm.comparison.page import main

if __name__ == "__main__":
    raise SystemExit(main())
