"""What runs inside the sandbox: the standard library only, and nothing of the rest of AlignTune.

The fork server loads this folder by path as the package `guest`, so that a process that runs model-written
code starts in tens of milliseconds and holds no configuration, no dataset and no secret of the training run.
"""
