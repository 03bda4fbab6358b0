# Two commands do everything: make demo, make test. CONTRIBUTING.md says what each part is for.
BIN := .venv/bin
# cython-lint calls pycodestyle by name.
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := pyproject.toml setup.py $(wildcard src/_fastcopy.pyx src/fastcopy/*) tools/setup
LAB := $(BIN)/python tests/vm/lab.py
KERNEL_TESTS := $(abspath $(BIN))/python -B -m pytest -p no:cacheprovider -q tests/kernel

.PHONY: demo test lint test-host test-wheel test-vm test-cdev test-driver bench bench-programs clean

demo: .venv/ready
	$(BIN)/python tools/demo.py

test: lint test-host test-wheel test-vm

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/cython-lint src/_fastcopy.pyx src/fastcopy/*.pxi
	$(BIN)/mypy
	$(BIN)/stubtest --ignore-missing-stub vfiomig._fastcopy

test-host: .venv/ready-test
	$(BIN)/python -m pytest -q --ignore=tests/kernel

# The package as a user installs it: built alone, in an environment of its own.
test-wheel: .venv/ready-test
	tools/test-wheel

# The kernel tests on Debian's 6.12 kernel with its mtty driver, in a virtual machine.
test-vm: .venv/ready-test
	$(LAB) prepare
	$(LAB) run --env VFIOMIG_REQUIRE_KERNEL=1 -- $(KERNEL_TESTS)

# The same by /dev/vfio/devices and iommufd, on a kernel built from Debian's source; cached.
test-cdev: .venv/ready-test
	$(LAB) prepare --kernel cdev
	$(LAB) run --kernel cdev --env VFIOMIG_REQUIRE_KERNEL=1 --env VFIOMIG_REQUIRE_CDEV=1 \
		-- $(KERNEL_TESTS)

# The test device's driver, abused on a kernel that finds its mistakes; cached.
# VFIOMIG_ABUSE_ROUNDS=N: longer; VFIOMIG_ABUSE_SEED=N: what a failure said, again.
test-driver: .venv/ready-test
	$(LAB) prepare --kernel debug
	$(LAB) run --kernel debug --cpus 2 --memory 2G --timeout 60 -- $(abspath $(BIN))/python -B \
		tests/abuse/main.py \
		$(if $(VFIOMIG_ABUSE_ROUNDS),--rounds $(VFIOMIG_ABUSE_ROUNDS)) \
		$(if $(VFIOMIG_ABUSE_SEED),--seed $(VFIOMIG_ABUSE_SEED))

bench: .venv/ready-test
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-group-by=func -q --rootdir . $(if $(QUICK),--quick)

# The C programs that vfiomig bench compares with: --programs benchmarks/build
bench-programs: benchmarks/build/qemu_like benchmarks/build/plain_ring

benchmarks/build/%: benchmarks/programs/%.c benchmarks/programs/transfer.h
	mkdir -p $(@D)
	$(CC) -std=gnu11 -O2 -Wall -Wextra -pthread -o $@ $<

.venv/ready: $(SOURCES)
	tools/setup
	touch $@

.venv/ready-test: $(SOURCES) tests/vm/packages.txt
	tools/setup test
	touch .venv/ready $@

clean:
	rm -rf .venv build dist benchmarks/build src/*.c src/vfiomig/*.so src/*.egg-info
