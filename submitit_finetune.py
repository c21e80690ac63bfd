"""Submit classifiers to a cluster: flags of main_finetune.py and of the launcher (see --help).

python submitit_finetune.py --nodes 4 --job_dir DIR --finetune RUN/checkpoint-last.pth --data_path DATA
"""

import sys

from util.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch("main_finetune", about=__doc__))
