"""Submit pretraining to a cluster: flags of main_pretrain.py and of the launcher (see --help).

python submitit_pretrain.py --nodes 8 --job_dir DIR @recipes/mae_pl_vit_base.args --data_path DATA
"""

import sys

from util.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch("main_pretrain", about=__doc__))
