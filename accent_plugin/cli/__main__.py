"""Run the command line as `python -m accent_plugin.cli`."""

import sys

from accent_plugin.cli.main import main

sys.exit(main())
