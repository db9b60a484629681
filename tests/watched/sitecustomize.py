"""Every Python that starts with this folder on its path says where it is, and ends, after a while.

So do the children of a child that a test runs: nobody waits for them, or leaves them behind.
"""

import faulthandler
import os

faulthandler.dump_traceback_later(float(os.environ["END_AFTER_SECONDS"]), exit=True)
