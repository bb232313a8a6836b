# What CONTRIBUTING.md lists, by name. `make install` into a virtual environment of your own first.
.PHONY: help install test fast lint types docs golden bench host mutations peers models ci

help:      ## this list
	@sed -n 's/^\([a-z]*\): *## /\1 /p; s/^\([a-z]*\):  *## /\1 /p' $(MAKEFILE_LIST) | sort -u

install:   ## the library with all that its development needs, at the tested versions
	pip install -c constraints.txt -e ".[dev]"

test:      ## all tests, in two processes
	pytest -n 2 --dist worksteal

fast:      ## a few minutes of them
	pytest -n 2 -m "not slow"

lint:      ## ruff, mended where it can be
	ruff check --fix .
	ruff format .

types:     ## mypy
	mypy

docs:      ## the documentation as a site, on this machine
	NO_MKDOCS_2_WARNING=1 mkdocs serve

golden:    ## did a change move a number? AGAINST=HEAD~1
	python -m benchmarks.golden --against $(or $(AGAINST),HEAD)

host:      ## calls and microseconds a layer
	python -m benchmarks.host

bench:     ## whether the benchmarks run
	pytest benchmarks/ --quick -q

mutations: ## do the tests notice a broken engine?
	python -m benchmarks.mutations

peers:     ## do PEFT's, accelerate's and TRL's own tests pass on patched models?
	python -m benchmarks.peers

models:    ## every model type of transformers through patch, and docs/MODELS.md
	OMP_NUM_THREADS=1 python -m benchmarks.model_sweep --workers 2

ci:        ## what must pass before a change lands
	bash .ci/run
