"""The command line, called by the path of this file: ``python .../lance-native/lance.py download``.

For a Python that does not look into the folder that it is started in, as that of ComfyUI's portable package for Windows.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).absolute().parent))
    from lance_runtime.__main__ import main

    sys.exit(main())
