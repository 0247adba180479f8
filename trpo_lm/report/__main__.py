"""`python -m trpo_lm.report RUN`: redraw the figures of a run."""

from trpo_lm.report.figures import main

raise SystemExit(main())
