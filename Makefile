# make train   train the default job on 4 local processes
# make test    run the tests
# make test-lab  run the laboratory's tests
# make figures run and draw the paper's experiments, into runs/artifact
# make lint    check style
# make types   check types
# make docs    build the documentation site, into build/site
# make packages  build wheel and sdist, and use the wheel in a fresh environment
# make versions  then use the wheel with every Python and torch that can be had here
# make clean   remove the virtual environment and everything made here
#
# Each sets up .venv by itself, once; PYTHON names the interpreter to make it with.

PYTHON ?= python3
NUM_PROCESSES ?= 4
PYTEST_ARGS ?= -n 3 --dist worksteal

export PIP_CONSTRAINT := constraints.txt

.PHONY: train test test-lab figures lint types docs packages versions clean

train: .venv/.train
	.venv/bin/dcp train --num-processes $(NUM_PROCESSES) $(TRAIN_ARGS)

test: .venv/.dev
	.venv/bin/pytest --ignore tests/lab $(PYTEST_ARGS)

test-lab: .venv/.dev
	.venv/bin/pytest tests/lab $(PYTEST_ARGS)

figures: .venv/.dev
	.venv/bin/python -m lab figures $(FIGURES_ARGS)

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.dev
	.venv/bin/mypy

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

packages:
	PYTHON="$(PYTHON)" bash scripts/check_packages.sh dist

versions: packages
	"$(PYTHON)" scripts/check_versions.py dist/*.whl

.venv/.train: pyproject.toml constraints.txt scripts/make_venv.sh
	PYTHON="$(PYTHON)" bash scripts/make_venv.sh train
	touch $@

.venv/.dev: pyproject.toml constraints.txt scripts/make_venv.sh
	PYTHON="$(PYTHON)" bash scripts/make_venv.sh train,plots,serve,video,docs,dev
	touch .venv/.train $@

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
