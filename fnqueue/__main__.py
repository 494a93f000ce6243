"""`python -m fnqueue`. Parsed by any Python 3, so that an old one gets a sentence and no traceback."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  that is what it is for
    sys.exit("fnqueue needs Python 3.11 or newer; this is %d.%d (%s)" % (*sys.version_info[:2], sys.executable))  # noqa: UP031

from fnqueue.cli import main

if __name__ == "__main__":
    sys.exit(main())
