"""``python -m avq_jax`` is the command ``avq-jax``."""

from avq_jax.cli import main

raise SystemExit(main())
