"""From a --data_path to decoded, cropped images."""
