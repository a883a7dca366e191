# make demo      the whole way on two CPU cores, from drawn talkers to a report
# make test      ruff, mypy and the tests
# make lint      ruff and mypy alone
# make format    put the source in order
# make packages  Debian packages that some tests need (root; others skip, saying so)
# make lock      write the versions installed in .venv to constraints.txt

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
# Processes that share the test files: some tests start four ranks, or a cluster.
TEST_WORKERS ?= 2
SOURCES := echolab data_prep tests

.PHONY: demo test lint format packages lock

demo: $(READY)
	$(BIN)/echolab demo

test: lint
	$(BIN)/pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The stamp is written last, so an installation that was interrupted is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	    { echo "make: Python 3.11 is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

# Nothing is asked of the network when all of it is there.
packages:
	@if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "make packages: not root on Debian: tests that need Chromium or Slurm will skip"; \
	    exit 0; \
	fi; \
	set -e; \
	wanted=""; \
	command -v chromium >/dev/null || wanted="$$wanted chromium fonts-dejavu-core"; \
	command -v git >/dev/null || wanted="$$wanted git"; \
	command -v ps >/dev/null || wanted="$$wanted procps"; \
	command -v chattr >/dev/null || wanted="$$wanted e2fsprogs"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || wanted="$$wanted python3.11-venv"; \
	if [ -n "$$wanted" ]; then \
	    apt-get update -qq; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$wanted; \
	fi; \
	if ! command -v slurmctld >/dev/null || ! command -v slurmdbd >/dev/null; then \
	    ECHOLAB_SLURM_ACCOUNTING=1 bash tests/slurm_cluster.sh install; \
	fi

# The local part of a version (+cpu) is dropped: it names a build, not a version.
lock: $(READY)
	$(BIN)/pip freeze --exclude-editable --disable-pip-version-check | sed 's/+[a-z0-9.]*$$//' \
	    > constraints.new
	sed '/^[^#]/d' constraints.txt > constraints.tmp
	cat constraints.tmp constraints.new > constraints.txt
	rm constraints.tmp constraints.new
