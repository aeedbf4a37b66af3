# Every command that the README, CONTRIBUTING and CI use. `make demo` and `make test` install first.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test nltk-data test-slow proof-s3 timm test-cluster test-chaos check fmt docs docs-run pictures images cluster-up cluster-down constraints clean

demo: install  ## four iterations on the embedded default, then the report
	$(BIN)/python -m controller run --iterations 4

test: install  ## every test that is neither slow nor needs a cluster
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: install  ## the others: whole runs, kills, two processes, S3 servers (needs Go)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

proof-s3: install  ## the long proofs of docs/object-store.md: four iterations on S3 servers, 200 races
	PROOF_ITERATIONS=4 PROOF_ROUNDS=200 $(BIN)/python -m pytest -s -m slow tests/test_store_s3_demo.py \
	  tests/test_store_s3.py

nltk-data: install  ## NLTK data for the tests, from pip and apt packages (Debian) into build/
	$(BIN)/python -m tests.nltk_folder

check: install  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

fmt: install  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: .venv/installed  ## everything, into .venv

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[all,dev]"
	touch $@

timm: install  ## OmniLMM's image tower against timm's, which is fetched without torchvision
	$(BIN)/python -m pip install -q --target build/timm --no-deps timm==1.0.31
	$(BIN)/python -m tests.timm_tower build/timm

docs-run: install  ## every command of README and docs that can run here, on tiny data
	$(BIN)/python -m pytest -s -m slow tests/test_docs_run.py

docs: install  ## the generated tables of README and docs
	$(BIN)/python docs/generate.py

pictures: install  ## the pictures of the docs from the demo's run (needs chromium)
	$(BIN)/python docs/pictures.py runs/demo

constraints:  ## newest versions into constraints.txt; run `make test` before you commit them
	$(BIN)/uv pip compile pyproject.toml --extra all --extra dev --universal --python-version 3.11 \
	  --no-header --no-annotate --no-emit-index-url --upgrade --output-file constraints.txt

# On KUBECONFIG's cluster where that is set; else on one of its own, which needs root and Go and is gone afterwards.
CLUSTER_TEST = test -n "$$KUBECONFIG" || { trap '$(PYTHON) k8s/dev/cluster.py down' EXIT; \
	$(PYTHON) k8s/dev/cluster.py setup; }; $(BIN)/python -m pytest -v -s --durations=0 --timeout 3600

test-cluster: install  ## the demo on a real Kubernetes, with our images: rows and choices equal the local run's
	set -e; export RLAIFV_TEST_CLUSTER=1; $(CLUSTER_TEST) tests/cluster

test-chaos: install  ## the same with pods and controllers killed, evictions, quotas, too little memory and time
	set -e; export RLAIFV_TEST_CLUSTER=chaos; $(CLUSTER_TEST) tests/cluster/test_chaos.py

proof-demo: install  ## three seeds and shuffled verdicts: hallucination falls, and does not (25 minutes and more)
	$(BIN)/python -m tests.proofs.demo

proof-kills: install  ## 50 random SIGKILLs end with the rows of an undisturbed run (20 minutes)
	$(BIN)/python -m tests.proofs.kills

images:  ## core, eval and gpu, with docker, podman or buildah; flags: make images FLAGS="--tag dev"
	$(PYTHON) images/build.py $(FLAGS)

cluster-up:  ## a real Kubernetes on this machine: kind, or without Docker (root, Linux, Go)
	$(PYTHON) k8s/dev/cluster.py up

cluster-down:
	$(PYTHON) k8s/dev/cluster.py down

clean:  ## removes the environment and the demo's run
	rm -rf .venv runs
