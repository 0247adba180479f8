"""`python -m trpo_lm.report RUN`: draw the figures of a run again."""

from trpo_lm.report.figures import main

raise SystemExit(main())
