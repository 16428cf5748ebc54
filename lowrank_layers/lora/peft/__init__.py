"""The file format of PEFT: ``adapter_config.json`` beside ``adapter_model.safetensors``.

``load.find_peft`` reads such a folder for a model and ``save.save_lora`` writes one. On the way, ``config`` has the
settings, ``target_modules`` finds the weights that they select, ``keys`` knows the names in the file, ``tensors`` how
the factors lie in it, ``collect`` gathers the adapters of a model and says which of them PEFT has no layer for, and
``encode`` turns them into settings and tensors. Files of other makers are read in ``lora/loralib.py`` and
``lora/diffusers.py``; ``lora/load.py`` tells all of them apart.
"""
