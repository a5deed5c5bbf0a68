# make book | make test | make help for the rest
PYTHON ?= python3
# Index with the CPU builds of PyTorch; `make TORCH_INDEX= ...` takes the CUDA build instead.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
READY := .venv/ready
# One thread a process: on a shared machine more threads make small networks slower, and results reproducible only per thread count.
export OMP_NUM_THREADS ?= 1
export PYTHONHASHSEED := 0
# The package of this checkout, also where several checkouts share one environment.
export PYTHONPATH := $(CURDIR)

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 18

book: $(READY)   ## build the book into _build/html
	rm -rf _build
	$(BIN)/python tools/reference.py
	$(BIN)/jb build -W -n --keep-going .
	@echo "Read it: file://$(CURDIR)/_build/html/index.html"

test: book build/axe.min.js  ## every test: unit, notebooks, assignments, hygiene, browser
	PYTHONWARNINGS=error::RuntimeWarning $(BIN)/python -m pytest -m "not slow" -rs -n 2 --dist loadscope

# The accessibility rules, for the browser test; without npm that test says why it is skipped.
build/axe.min.js:
	@mkdir -p build
	@command -v npm > /dev/null || { echo "no npm: the accessibility test will be skipped"; exit 0; }; \
	  cd build && npm pack --silent axe-core@4.14.1 > /dev/null && tar -xzf axe-core-4.14.1.tgz package/axe.min.js \
	  && mv package/axe.min.js axe.min.js && rm -rf package axe-core-4.14.1.tgz || echo "axe-core could not be fetched"

notebooks: $(READY) scratch  ## write and execute notebooks from their text: make notebooks NB=book/03_x/02_y.md (none: the stale ones)
	$(BIN)/python tools/notebooks.py $(NB)

scratch: $(READY)            ## export the chapters' NumPy cells to dlgm_tutorial/scratch
	$(BIN)/python tools/export_scratch.py

assignments: $(READY)        ## build the assignments for students and graders into build/assignments
	$(BIN)/python assignments/build.py

grade: $(READY)  ## make grade A=01_exact_inference SUBMISSIONS=folder OUT=grades: grade a folder of notebooks
	$(if $(and $(A),$(SUBMISSIONS),$(OUT)),,$(error usage: make grade A=01_exact_inference SUBMISSIONS=folder OUT=grades))
	$(BIN)/python assignments/build.py $(A)
	$(BIN)/python assignments/grade.py build/assignments/$(A)/autograder/$(A)-autograder.zip $(SUBMISSIONS) $(OUT)

$(READY): requirements.txt
	@command -v $(PYTHON) > /dev/null || { echo "no $(PYTHON): install Python 3.10 or newer, or name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: name a newer one with make PYTHON=..." >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv || { rm -rf .venv; $(PYTHON) -m venv --without-pip .venv \
	  && $(PYTHON) -m pip --python .venv/bin/python install -q pip; } \
	  || { rm -rf .venv; echo "no virtual environment: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -q --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $(READY)

test-quick: $(READY)         ## unit tests alone, for daily work: under two minutes
	$(BIN)/python -m pytest -n 2 --dist loadscope tests --ignore tests/test_html.py --ignore tests/test_book.py --ignore tests/test_assignments.py

test-all: book build/axe.min.js  ## everything, for the night: also 20 kills, every page twice, in the browser and on Colab
	PYTHONWARNINGS=error::RuntimeWarning $(BIN)/python -m pytest -rfEs -n 2 --dist loadscope -m "slow or not slow"

passport: $(READY)           ## run notebooks as Colab would: make passport NB=book/03_x/02_y.ipynb (none: all)
	$(BIN)/python tools/colab.py $(NB)

bench: .venv-bench/ready     ## time the package beside its peers: make bench [BENCH=training_step]
	.venv-bench/bin/python -m benchmarks $(BENCH)

.venv-bench/ready: requirements.txt benchmarks/requirements.txt
	rm -rf .venv-bench
	$(PYTHON) -m venv .venv-bench || { rm -rf .venv-bench; $(PYTHON) -m venv --without-pip .venv-bench \
	  && $(PYTHON) -m pip --python .venv-bench/bin/python install -q pip; }
	.venv-bench/bin/python -m pip install -q --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements.txt)"
	.venv-bench/bin/python -m pip install -q -c requirements.txt -r benchmarks/requirements.txt \
	  numpy scipy autograd scikit-learn pooch mpmath matplotlib
	touch $@

clean:           ## remove the built book and the environment
	rm -rf _build .venv .venv-bench build .pytest_cache

.PHONY: help book test test-quick test-all passport notebooks scratch assignments grade bench clean
.DEFAULT_GOAL := help
