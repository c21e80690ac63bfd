"""Submit pretraining to a cluster: all flags of main_pretrain.py, and the cluster's (see --help).

python submitit_pretrain.py --nodes 8 --job_dir DIR @recipes/mae_pl_vit_base.args --data_path DATA
"""

import sys

from util.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch("main_pretrain"))
