"""PEFT's own tests, run against lowrank_layers.

``tests/test_custom_models.py`` and ``tests/test_initialization.py`` of PEFT's repository import ``get_peft_model``,
``PeftModel`` and so on from ``peft``. The shim puts functions of the same names in their place, each of which is a call
or two of this library (``model.py``), shows the parameters of an adapted layer under the names that the tests look for
(``layers.py``), and changes no assertion. Configurations are PEFT's own. ::

    git clone https://github.com/huggingface/peft
    PEFT_TESTS=peft/tests python tests/lora/peft_suite -q
    PEFT_TESTS=peft/tests python tests/lora/peft_suite -q -k "TestMixedAdapterBatches"

Take the commit of the installed version, or its source distribution (``pip download --no-deps --no-binary peft``).
Nothing of PEFT's repository is part of this one. What is deselected, and counted at the end of a run:

- tests of other tuners (IA3, OFT, VeRA, ...), by their parameters, their class or their name;
- variants that are settings of ``LoraConfig`` and other methods all the same (KaSA, VeLoRA, BD-LoRA, MonteCLoRA, MiCA,
  aLoRA, QALoRA);
- tests that load a model from the hub.

Failures by design stand in ``by_design.txt`` with the reason, by the names of the tests, and are reported as
``xfailed``. Whatever is reported as ``failed`` is a fault.

PEFT accepts ranks above the matrix: there the shim asks for the matrix's own, at PEFT's scaling, since the tests' toy
layers have ranks of one to five and PEFT's default is eight. Where ours refuses what PEFT refuses, the shim repeats
PEFT's words, so that the assertions after it run; the refusal has to be ours.

Measured with PEFT 0.21.2 and its own two files of tests, which its source distribution holds (``conftest.py`` and
``__init__.py`` from the repository at 5d602fdb): of 19,887 tests 2,505 are about LoRA: 1,834 passed, none failed, 522
failed by design, 30 passed where a failure by design was expected, and 119 were skipped by the tests themselves.
17,382 were deselected. One process takes one minute on a quiet machine.
"""
