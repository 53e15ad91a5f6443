# The commands of the README. CI runs `make check` and `make test` in a fresh clone.
#
#   make setup     the environment in .venv: uv where there is one, else pip; versions from constraints.txt
#   make demo      a small sweep on a real language model and its experts
#   make serve     Prefect and MLflow over the data of the demo, on fixed ports
#   make deploy    while it runs: sweeps and merges as forms on Prefect's page      make worker   does what they ask for
#   make test      the test suite           make check   linters, types, import contracts
#   make bench     a quick look at each benchmark; AGAINST=PATH/TO/mergekit-yaml puts mergekit beside
#   make fuzz      damaged files and documents, FUZZ of them for each reader, others in every run
#   make coverage  the tests that run in one process, and the lines they reach
#   make every-model-type   saves, merges, folds and extracts a tiny model of every type of transformers; 15 minutes
#   make docs      docs/methods.md anew from the classes, then the site in site/
#   make lock      constraints.txt anew from pyproject.toml
#
# TORCH is the one setting for another torch build: any requirement that pip takes, or the path of a wheel, as in
#   make setup TORCH="torch==2.13.0+cu130"
# With uv, UV_TORCH_BACKEND=auto picks the build that fits the machine's driver.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
# A folder of wheels that pip is configured to look into holds for uv as well.
LINKS := $(or $(UV_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
EXTRAS := examples,search,dev,docs
# The tests run in so many processes, each with whole files: servers and trained models are made once a process.
PROCESSES ?= 2
SPEC ?= examples/demo.yaml
STORE ?= .mergeloom
# Where `make serve` answers: the address it has left in the store. Settings are per process, nobody's profile is touched.
SERVER ?= $(or $(shell sed -n 's/.*"prefect": "\([^"]*\)".*/\1/p' $(STORE)/serving.json 2>/dev/null),http://127.0.0.1:4200/api)
CLIENT := PREFECT_HOME="$(abspath $(STORE))/prefect" PREFECT_API_URL="$(SERVER)"
PREFECT := $(CLIENT) $(BIN)/prefect --no-prompt

export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export NO_MKDOCS_2_WARNING := 1

.PHONY: setup demo serve deploy worker test fuzz check coverage every-model-type docs bench mergekit-results lock clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { echo "Mergeloom needs Python 3.11 to 3.13; name one with PYTHON=python3.11"; exit 1; }
ifneq ($(UV),)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	UV_FIND_LINKS="$(LINKS)" $(UV) pip install --quiet --python $(BIN)/python "$(TORCH)" -c constraints.txt
	UV_FIND_LINKS="$(LINKS)" UV_COMPILE_BYTECODE=1 $(UV) pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]'
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
endif
	@touch $@

examples/base/config.json: | setup
	$(BIN)/python examples/make_base.py

examples/tasks/data: | setup
	$(BIN)/python examples/make_tasks.py

demo: setup examples/base/config.json examples/tasks/data
	$(BIN)/mergeloom sweep $(SPEC)

serve: setup
	$(BIN)/mergeloom serve --store $(STORE)

deploy: setup
	@$(PREFECT) work-pool create local --type process >/dev/null 2>&1 || true  # it may be there already
	$(CLIENT) $(BIN)/python -m flows.deploy deployments/prefect.yaml deployments/crashed.yaml

worker: setup
	$(PREFECT) worker start --pool local --type process --limit 2

test: setup
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile

# The suite draws a few hundred, the same in every run. A failure prints a line that repeats it.
FUZZ ?= 5000
fuzz: setup
	FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/fuzz --timeout=0

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Servers, browsers and benchmarks run in processes of their own, whose lines are not counted; they are left out.
coverage: setup
	$(BIN)/python -m pytest --cov --cov-report=term \
	  --ignore=tests/flows --ignore=tests/ui --ignore=tests/benchmarks --ignore=tests/docs --ignore=tests/mergeloom

# The table goes to docs/model-types.md. Name some with TYPES="llama bert", and nothing is written.
every-model-type: setup
	$(BIN)/python -m tests.checkpoints.every_model_type $(or $(TYPES),--table docs/model-types.md)

docs: setup
	$(BIN)/mergeloom methods --markdown > docs/methods.md
	$(BIN)/mkdocs build --strict --quiet

# A quick look at each benchmark; what is reported is measured with larger sizes and more repeats (see each one's --help).
BENCH_MODELS ?= .bench/0.1
bench: setup
	$(BIN)/python benchmarks/models.py --size 0.1 --folder $(BENCH_MODELS)
	$(BIN)/python benchmarks/merge.py --size 0.1 --folder $(BENCH_MODELS) --repeats 1 --methods linear task_arithmetic ties \
	  $(if $(AGAINST),--against $(AGAINST))
	$(BIN)/python benchmarks/sweep.py --size 0.1 --folder $(BENCH_MODELS) --repeats 1 $(if $(AGAINST),--against $(AGAINST))
	$(BIN)/python benchmarks/kernels.py --elements 8 --repeats 1
	$(BIN)/python benchmarks/profile.py --size 0.02 --repeats 1
	$(BIN)/python benchmarks/orchestration.py plan --cells 1000

# What mergekit makes of the recipes in tests/mergekit, anew. MERGEKIT: the Python of an environment that has it.
mergekit-results: setup
	@test -n "$(MERGEKIT)" || { echo "say MERGEKIT=environment/bin/python (docs/mergekit.md)"; exit 1; }
	$(BIN)/python tests/mergekit/make_results.py $(MERGEKIT)

lock: setup
	@test -n "$(UV)" || { echo "make lock needs uv"; exit 1; }
	UV_FIND_LINKS="$(LINKS)" $(UV) pip compile pyproject.toml --extra examples --extra search --extra dev --extra docs --quiet \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-package torch -o constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage site
