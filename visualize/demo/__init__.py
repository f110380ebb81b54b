"""The demo application: recognise, enrol, annotate, reconstruct and verify faces in the browser."""
