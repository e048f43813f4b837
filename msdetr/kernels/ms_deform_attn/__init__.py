"""Multi-scale deformable attention. Launchers are in `launch`, a kernel in each other module."""
