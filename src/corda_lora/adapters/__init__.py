"""Adapters as PEFT LoRAs: installed, saved, loaded, exported."""
