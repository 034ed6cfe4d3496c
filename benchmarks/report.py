"""The command `python benchmarks/report.py`; what it does is in the folder benchmarks/report/."""

import report  # the folder: Python takes it before a file of the same name
import tyro

if __name__ == "__main__":
    report.main(tyro.cli(report.Options, description=report.__doc__.splitlines()[0]))
