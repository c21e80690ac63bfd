"""Submit SERE pretraining to a cluster: flags of main_sere.py and of the launcher (see --help).

python submitit_sere.py --nodes 4 --job_dir DIR @recipes/sere_vit_small.args --data_path DATA
"""

import sys

from util.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch("main_sere", about=__doc__))
