"""What utils/pretrain.py trains: data, the model, LitGPT's options, tiny-math."""
