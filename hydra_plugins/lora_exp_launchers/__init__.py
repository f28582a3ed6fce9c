"""``hydra/launcher=basic|joblib|submitit_local|submitit_slurm|ray``: where a sweep's jobs run.

What runs them is Hydra's, joblib's, submitit's and Ray's. Around that stands what every sweep of ours has: its jobs are
written down, shown, and asked to stop by the same signals. Hydra imports these files at each start: they import no
launcher's library.
"""
