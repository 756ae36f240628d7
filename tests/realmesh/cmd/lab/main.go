// Command lab drives a control plane under test: it applies objects (with
// their status), plays ztunnel or a waypoint over delta xDS and prints what it
// is sent, and asks for tokens and certificates.
package main

import (
	"fmt"
	"os"
)

func main() {
	verbs := map[string]func([]string) error{
		"apply": apply, "delete": remove, "xds": xdsDump, "csr": csr, "token": token,
	}
	if len(os.Args) < 2 || verbs[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: lab apply|delete|xds|csr|token [flags]")
		os.Exit(2)
	}
	if err := verbs[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}
